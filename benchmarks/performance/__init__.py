"""How fast it is: against TRL on the same machine, against bare vLLM, and where the time and memory go."""
