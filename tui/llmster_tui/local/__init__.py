"""A whole pool on this machine: started, supervised, stopped, and shown off."""
