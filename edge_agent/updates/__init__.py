"""New versions of the agent's software: fetched, checked, installed beside the old, proven."""
