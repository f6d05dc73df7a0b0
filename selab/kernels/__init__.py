"""The SE block in as few passes over memory as it takes: on a CPU, on a GPU, and as one operator of torch's."""
