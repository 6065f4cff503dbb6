"""What a run costs, and where its time goes: energy and profiler traces."""
