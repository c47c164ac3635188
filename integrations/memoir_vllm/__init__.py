"""Everything of memoir-retrieval that touches vLLM."""
