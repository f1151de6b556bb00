"""Pictures: their files, metadata, figures (PSNR, SSIM) and safety filter."""
