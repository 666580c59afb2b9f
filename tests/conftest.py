"""Set before anything imports torch: two test processes on two cores, one thread each, and threads that sleep while they wait."""
import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"
