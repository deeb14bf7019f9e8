"""The database of the hub.

store.py       one writer, many readers, transactions as functions
schema.py      the tables as they are now
migrations/    how they came about; a test holds the two together
"""
