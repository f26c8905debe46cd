"""The loop from requests to text. Imports nothing until a module of it is asked for."""
