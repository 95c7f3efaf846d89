"""What fit, scores and self-influence will cost, told before they run: counted work, and time and memory from a rehearsal."""
