"""What runs inside of the sandbox: scripts that are started by their path and use the standard library alone.

run.py is the process, locks.py what it may no longer do. The other side of the pipe is groundup/rewards/sandbox.py.
"""
