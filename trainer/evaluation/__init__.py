"""Who is compared at how many network calls, and by which measures."""
