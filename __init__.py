"""Trainyard: training inside the graph. Nothing of ComfyUI is imported here, so that tests and tools can load the pack
anywhere."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's V3 door to the pack."""
    from .nodes import TrainyardExtension

    return TrainyardExtension()
