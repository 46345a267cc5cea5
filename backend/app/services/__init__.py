"""What the portal does, below every door: turns, sessions, history, the LLM client, accounts."""
