"""From edits to a store: wordings, training, audit, memories, and building masks alone."""
