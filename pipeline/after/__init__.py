"""After a job: every byte checked, samples solved again, noise and labels put to the test."""
