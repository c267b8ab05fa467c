"""A model's output, read as it arrives: content, reasoning and tool calls; and the other way round,
what a request says of tools. No torch, no HTTP."""
