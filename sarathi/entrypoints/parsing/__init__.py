"""Incremental parsing of an answer into reasoning, content and tool calls; tools as grammars and prompts."""
