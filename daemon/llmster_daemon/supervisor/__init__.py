"""Engine processes: started, watched, restarted with backoff, found again after a restart."""
