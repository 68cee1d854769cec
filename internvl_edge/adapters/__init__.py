"""Adapters to other libraries. Each has its own extra, and no other module of this project imports them."""
