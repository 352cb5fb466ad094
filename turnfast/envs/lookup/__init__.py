"""The built-in world: invented people, places and works, and a search tool."""
