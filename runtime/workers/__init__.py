"""Calls into functions that may raise, hang or crash, in processes of their own.

- `worker_pool`: starts, calls, kills and replaces the processes
- `worker_process`: the script that runs in each of them
"""
