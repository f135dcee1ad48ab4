"""Workers on Ray: how many, where, and which task each takes next."""
