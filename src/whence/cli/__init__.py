"""The command line: each verb is one library call. Nothing here imports torch before a verb runs."""
