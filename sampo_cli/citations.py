"""BibTeX of the methods' papers. Text only."""

from __future__ import annotations

DPO = """@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano
            and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://arxiv.org/abs/2305.18290}
}"""

SAMPO = """@inproceedings{lu2024eliminating,
  title = {Eliminating Biased Length Reliance of Direct Preference Optimization via Down-Sampled {KL} Divergence},
  author = {Lu, Junru and Li, Jiazheng and An, Siyu and Zhao, Meng and He, Yulan and Yin, Di and Sun, Xing},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year = {2024},
  url = {https://arxiv.org/abs/2406.10957}
}"""

SLIC = """@article{zhao2023slic,
  title = {{SLiC-HF}: Sequence Likelihood Calibration with Human Feedback},
  author = {Zhao, Yao and Joshi, Rishabh and Liu, Tianqi and Khalman, Misha and Saleh, Mohammad and Liu, Peter J.},
  journal = {arXiv preprint arXiv:2305.10425},
  year = {2023},
  url = {https://arxiv.org/abs/2305.10425}
}"""

IPO = """@inproceedings{azar2024general,
  title = {A General Theoretical Paradigm to Understand Learning from Human Preferences},
  author = {Azar, Mohammad Gheshlaghi and Guo, Zhaohan Daniel and Piot, Bilal and Munos, R{\\'e}mi and Rowland, Mark
            and Valko, Michal and Calandriello, Daniele},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year = {2024},
  url = {https://arxiv.org/abs/2310.12036}
}"""

KTO = """@inproceedings{ethayarajh2024kto,
  title = {{KTO}: Model Alignment as Prospect Theoretic Optimization},
  author = {Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2402.01306}
}"""

DPOP = """@article{pal2024smaug,
  title = {Smaug: Fixing Failure Modes of Preference Optimisation with {DPO}-Positive},
  author = {Pal, Arka and Karkhanis, Deep and Dooley, Samuel and Roberts, Manley and Naidu, Siddartha
            and White, Colin},
  journal = {arXiv preprint arXiv:2402.13228},
  year = {2024},
  url = {https://arxiv.org/abs/2402.13228}
}"""

IRPO = """@inproceedings{pang2024iterative,
  title = {Iterative Reasoning Preference Optimization},
  author = {Pang, Richard Yuanzhe and Yuan, Weizhe and Cho, Kyunghyun and He, He and Sukhbaatar, Sainbayar
            and Weston, Jason},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2404.19733}
}"""

R_DPO = """@inproceedings{park2024disentangling,
  title = {Disentangling Length from Quality in Direct Preference Optimization},
  author = {Park, Ryan and Rafailov, Rafael and Ermon, Stefano and Finn, Chelsea},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
  year = {2024},
  url = {https://arxiv.org/abs/2403.19159}
}"""

TDPO = """@inproceedings{zeng2024token,
  title = {Token-level Direct Preference Optimization},
  author = {Zeng, Yongcheng and Liu, Guoqing and Ma, Weiyu and Yang, Ning and Zhang, Haifeng and Wang, Jun},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2404.11999}
}"""

BCO = """@article{jung2024binary,
  title = {Binary Classifier Optimization for Large Language Model Alignment},
  author = {Jung, Seungjae and Han, Gunsoo and Nam, Daniel Wontae and On, Kyoung-Woon},
  journal = {arXiv preprint arXiv:2404.04656},
  year = {2024},
  url = {https://arxiv.org/abs/2404.04656}
}"""

NCA = """@inproceedings{chen2024noise,
  title = {Noise Contrastive Alignment of Language Models with Explicit Rewards},
  author = {Chen, Huayu and He, Guande and Yuan, Lifan and Cui, Ganqu and Su, Hang and Zhu, Jun},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2402.05369}
}"""

SPPO = """@article{wu2024self,
  title = {Self-Play Preference Optimization for Language Model Alignment},
  author = {Wu, Yue and Sun, Zhiqing and Yuan, Huizhuo and Ji, Kaixuan and Yang, Yiming and Gu, Quanquan},
  journal = {arXiv preprint arXiv:2405.00675},
  year = {2024},
  url = {https://arxiv.org/abs/2405.00675}
}"""

ORPO = """@inproceedings{hong2024orpo,
  title = {{ORPO}: Monolithic Preference Optimization without Reference Model},
  author = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year = {2024},
  url = {https://arxiv.org/abs/2403.07691}
}"""

SIMPO = """@inproceedings{meng2024simpo,
  title = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2405.14734}
}"""

CPO = """@inproceedings{xu2024contrastive,
  title = {Contrastive Preference Optimization: Pushing the Boundaries of {LLM} Performance in Machine Translation},
  author = {Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and Van Durme, Benjamin
            and Murray, Kenton and Kim, Young Jin},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2401.08417}
}"""
