"""AnytimeNet (Kim, Bradford, Shao).

There are the executions, their times, and how accuracy and confidence grow with the iterations.
"""
