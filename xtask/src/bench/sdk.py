"""The same task through claude-agent-sdk: prints `result` when the result is there."""

import os
import sys

import anyio
from claude_agent_sdk import ClaudeAgentOptions, ResultMessage, query


async def main() -> None:
    options = ClaudeAgentOptions(
        cli_path=os.environ["BENCH_CLI"],
        cwd=os.environ["BENCH_WORK"],
        permission_mode="bypassPermissions",
        setting_sources=[],
        include_partial_messages=False,
    )
    async for message in query(prompt=os.environ["BENCH_PROMPT"], options=options):
        if isinstance(message, ResultMessage):
            print('"type":"result"', flush=True)


try:
    anyio.run(main)
except Exception as error:  # what the SDK makes of a line that it cannot take
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
