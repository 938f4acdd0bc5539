"""Multi-stage denoising: which tokens condition the DiT at which point of sampling, and how strongly."""
