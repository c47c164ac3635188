"""From a prompt to the edit that answers it, and the edited model that defines a right answer."""
