"""The commands behind `setup_llm.sh`."""
