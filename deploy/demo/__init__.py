"""The demo: a hub, three agents, real digits, and a story told from counted answers.

__main__.py   the story: acts, summary, report
fleet.py      the processes: start, stop, kill, find their addresses
traffic.py    applications that call the agents' doors, and the tally of their answers
"""
