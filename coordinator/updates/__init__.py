"""Updates over the air: which devices get which bundle when, and what came of it."""
