"""Who does the tasks: one loop that hands them out, and processes, threads or Ray actors that take them."""
