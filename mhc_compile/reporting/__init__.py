"""Rendering shared by every report: terminal, HTML, progress."""
