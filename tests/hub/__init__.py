"""A Hugging Face Hub on the loopback interface, for tests: the endpoints that the real client calls, and faults."""

from hub.repository import Repository
from hub.server import Hub

__all__ = ["Hub", "Repository"]
