"""Environments in which agents learn, and their views for other libraries."""
