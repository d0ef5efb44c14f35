cuda_version: int | None
torch_version: str
cuda_archs: str
