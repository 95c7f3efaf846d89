"""Evidence that scores can be believed."""
