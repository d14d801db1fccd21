"""Helper nodes for tests with a real server: what a graph needs when a toy checkpoint has no text encoder."""


async def comfy_entrypoint():
    from .nodes import Kit

    return Kit()
