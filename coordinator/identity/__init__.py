"""Who belongs to a fleet: its authorities, its roster, and how devices come in."""
