"""What `memoir bench` runs: engines in processes of their own, which take turns."""
