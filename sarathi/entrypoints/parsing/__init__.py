"""From the text of an answer to reasoning, content and tool calls, as it grows; and tools to grammars and prompts."""
