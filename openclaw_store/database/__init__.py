"""`Database`: the schema and its migrations, sessions, and group commit.

This room stores rows. It knows neither what a write means nor what is cached.
"""
