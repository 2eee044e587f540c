"""How needs become passes. Three verbs: forward, backward, sweep."""
