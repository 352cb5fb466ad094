"""placeholder"""

from .tool_env import ToolEnv


class SearchEnv(ToolEnv):
    pass
