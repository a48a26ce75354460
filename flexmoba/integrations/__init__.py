"""Integrations with other libraries, one module or package for each library."""
