"""`qwen2-ascend migrate`: MindSpeed-LLM's shell scripts as the same job for this project.

A script is read, never run. `lexer.py` cuts its text into words, `script.py` follows assignments
to the commands and their flags, `programs.py` knows which of our commands each program is and what
its flags become, `memory.py` asks the planner, and `command.py` writes the result.
"""
