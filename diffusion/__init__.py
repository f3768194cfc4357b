"""The mathematics that the pipeline and the trainer share.

One notation, everywhere:

    x_0, x_T        data, noise; time t runs down from T to 0
    x_t             alpha_t * x_0 + sigma_t * eps
    t_0 .. t_N      a grid, t_0 = T > t_1 > ... > t_N = 0; index 0 is noise, index N is data
    t, s            a step goes from t down to an earlier s: a solver's step, or a student's flow map G(x_t, t, s)
    mu(x_t, t)      a denoiser's estimate of x_0; what a network predicts is converted in prediction.py and stays there
    eps_hat         (x_t - alpha_t * mu)/sigma_t
    r, tau          sigma/alpha and sigma/(alpha + sigma), the clocks of the two frames in which the PF-ODE is solved
    w               guidance scale, mu_w = mu_uncond + w (mu_cond - mu_uncond); w = 1 is the conditional model

Times, alpha and sigma are float64; states have the solve's dtype; only a denoiser casts to its network's.
"""

# Raised whenever a change alters stored states by a single bit; it is part of every recipe.
NUMERICS_VERSION = 1
