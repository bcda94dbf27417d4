"""Rating data: reading it, describing it, splitting it."""
