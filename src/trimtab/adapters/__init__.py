"""Adapters: the controller behind the interfaces that people already have in their training code."""
