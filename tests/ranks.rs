//! Over two ranks the losses' and the batch norm's gradients are those of one process with the
//! whole batch; the fused block is the composed one; SGD is libtorch's own, bit for bit.
// Helpers of tests fail like tests.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::{Arc, Barrier, Mutex};

use cpcr::bridge::ops::{self, NormAct, SumOverRanks};
use cpcr::loss::{Alone, Counts, Objective, Path, TERMS, TermWeights};
use cpcr::model::{Outputs, Pyramid, Statistics};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Two threads that add up what they bring.
struct Two {
    barrier: Barrier,
    sum: Mutex<Vec<f64>>,
}

impl Two {
    fn new() -> Arc<Self> {
        Arc::new(Self { barrier: Barrier::new(2), sum: Mutex::new(Vec::new()) })
    }
}

impl SumOverRanks for Two {
    fn sum_in_place(&self, tensor: &Tensor) -> Result<(), String> {
        let mine = Vec::<f64>::try_from(tensor.reshape([-1])).map_err(|e| e.to_string())?;
        {
            let mut sum = self.sum.lock().unwrap();
            sum.resize(mine.len(), 0.0);
            sum.iter_mut().zip(&mine).for_each(|(s, m)| *s += m);
        }
        self.barrier.wait();
        let all = Tensor::from_slice(&self.sum.lock().unwrap()).view_as(tensor);
        self.barrier.wait();
        self.sum.lock().unwrap().clear();
        self.barrier.wait();
        tensor.shallow_clone().copy_(&all);
        Ok(())
    }
}

fn close(what: &str, a: &Tensor, b: &Tensor, tol: f64) {
    assert_eq!(a.size(), b.size(), "{what}");
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let (off, top) = ((&a - &b).abs().max().double_value(&[]), b.abs().max().double_value(&[]));
    assert!(top > 0.0 && off <= tol * top, "{what}: off by {off:e} of {top:e}");
}

/// Logits at all scales of `n` samples: main first.
fn logits(n: i64) -> Vec<[Tensor; 2]> {
    tch::manual_seed(5);
    let map = |side: i64| (Tensor::randn([n, 4, side, side], FLOAT)) * 3.0;
    [32, 16, 8, 4].map(|s| [map(s), map(s)]).into()
}

fn outputs(all: &[[Tensor; 2]], samples: &Tensor) -> Outputs {
    let pyramid = |d: usize| {
        let get = |s: usize| ops::channels_last(&all[s][d].index_select(0, samples)).unwrap();
        Pyramid { main: get(0), aux: Some([1, 2, 3].map(get)) }
    };
    Outputs { decoders: vec![pyramid(0), pyramid(1)], statistics: Statistics::default() }
}

const WEIGHTS: TermWeights =
    TermWeights { dice: 1.0, focal: 0.7, kd_main: 0.1, entropy: 0.2, kd_aux: 0.3 };

#[test]
fn losses_of_uneven_ranks_are_those_of_the_whole_batch() {
    // Samples 0..3 are labelled, 3..6 are not. Rank 0: 0, 1, 3; rank 1: 2, 4, 5.
    let parts: [(&[i64], i64, i64); 2] = [(&[0, 1, 3], 0, 2), (&[2, 4, 5], 2, 1)];
    let labels = Tensor::randint(4, [3, 32, 32], (Kind::Uint8, Device::Cpu));
    // Drawn once: other tests draw from the same generator meanwhile.
    let logits = logits(6);
    for path in [Path::Auto, Path::Plain] {
        let objective = Objective { path, ..Objective::default() };
        let counts = Counts { world: 1, labelled: 3, samples: 6 };
        let all = outputs(&logits, &Tensor::arange(6, (Kind::Int64, Device::Cpu)));
        let whole = objective.step(&all, &labels, &WEIGHTS, &counts, &Alone).unwrap();
        let two = Two::new();
        let threads = parts.map(|(samples, first, n)| {
            let (two, labels) = (Arc::clone(&two), labels.narrow(0, first, n));
            let out = outputs(&logits, &Tensor::from_slice(samples));
            std::thread::spawn(move || {
                let counts = Counts { world: 2, ..counts };
                objective.step(&out, &labels, &WEIGHTS, &counts, two.as_ref()).unwrap()
            })
        });
        let shares = threads.map(|t| t.join().unwrap());
        let terms = &shares[0].terms + &shares[1].terms;
        for (i, name) in TERMS.iter().enumerate() {
            let i = i as i64;
            close(name, &terms.narrow(0, i, 1), &whole.terms.narrow(0, i, 1), 1e-6);
        }
        for (root, whole) in whole.grads.iter().enumerate() {
            for ((samples, ..), share) in parts.iter().zip(&shares) {
                let theirs = whole.index_select(0, &Tensor::from_slice(samples));
                close("gradient", &(&share.grads[root] / 2.0), &theirs, 1e-5);
            }
        }
    }
}

/// Runs the fused block on `x` with upstream gradient `dy`: output, dx, dw, db, mean, variance.
fn fused(x: &Tensor, dy: &Tensor, p: f64, sync: Option<Arc<dyn SumOverRanks>>) -> Vec<Tensor> {
    let c = x.size()[1];
    let x = ops::channels_last(x).unwrap().detach().copy().set_requires_grad(true);
    let x_cl = ops::channels_last(&x).unwrap();
    let w = (Tensor::arange(c, FLOAT) * 0.1 + 0.5).set_requires_grad(true);
    let b = (Tensor::arange(c, FLOAT) * 0.05 - 0.1).set_requires_grad(true);
    let (mean, var) = (Tensor::zeros([c], FLOAT), Tensor::ones([c], FLOAT));
    let args = NormAct {
        weight: &w,
        bias: &b,
        running_mean: &mean,
        running_var: &var,
        momentum: 0.1,
        eps: 1e-5,
        slope: 0.01,
        dropout: p,
        key: 9,
        sync,
    };
    let y = ops::norm_act(&x_cl, &args).unwrap();
    ops::backward(&[y.shallow_clone()], &[dy.shallow_clone()]).unwrap();
    vec![y.detach(), x.grad(), w.grad(), b.grad(), mean, var]
}

fn composed(x: &Tensor, dy: &Tensor, mask: &Tensor) -> Vec<Tensor> {
    let c = x.size()[1];
    let x = x.copy().set_requires_grad(true);
    let w = (Tensor::arange(c, FLOAT) * 0.1 + 0.5).set_requires_grad(true);
    let b = (Tensor::arange(c, FLOAT) * 0.05 - 0.1).set_requires_grad(true);
    let (mean, var) = (Tensor::zeros([c], FLOAT), Tensor::ones([c], FLOAT));
    let y = x.batch_norm(Some(&w), Some(&b), Some(&mean), Some(&var), true, 0.1, 1e-5, false);
    let y = y.leaky_relu() * mask;
    ops::backward(&[y.shallow_clone()], &[dy.shallow_clone()]).unwrap();
    vec![y.detach(), x.grad(), w.grad(), b.grad(), mean, var]
}

const WHAT: [&str; 6] = ["output", "dx", "dweight", "dbias", "mean", "variance"];

#[test]
fn the_fused_block_is_the_composed_one() {
    tch::manual_seed(3);
    // Channel counts that do and do not fill a vector; means far from zero.
    for c in [1, 3, 16, 33] {
        let x = Tensor::randn([3, c, 20, 28], FLOAT) * 2.0 + 5.0;
        let wide = Tensor::randn([3, 2 * c, 20, 28], FLOAT);
        let wide = ops::channels_last(&wide).unwrap();
        for p in [0.0, 0.3] {
            // A slice of a wider gradient, as a concatenation gives, and a planar one.
            for dy in [wide.narrow(1, c, c), wide.narrow(1, 0, c).contiguous()] {
                let mask = ops::dropout_mask(&ops::channels_last(&x).unwrap(), p, 9).unwrap();
                let (ours, theirs) = (fused(&x, &dy, p, None), composed(&x, &dy, &mask));
                for ((what, a), b) in WHAT.iter().zip(&ours).zip(&theirs) {
                    close(&format!("{what} of {c} channels, p = {p}"), a, b, 2e-5);
                }
            }
        }
    }
}

#[test]
fn synchronised_statistics_are_those_of_the_whole_batch() {
    tch::manual_seed(4);
    let (x, dy) = (Tensor::randn([5, 6, 8, 8], FLOAT) + 2.0, Tensor::randn([5, 6, 8, 8], FLOAT));
    let whole = fused(&x, &dy, 0.0, None);
    let two = Two::new();
    let threads = [(0, 2), (2, 3)].map(|(first, n)| {
        let sync: Arc<dyn SumOverRanks> = two.clone();
        let (x, dy) = (x.narrow(0, first, n), dy.narrow(0, first, n));
        std::thread::spawn(move || fused(&x, &dy, 0.0, Some(sync)))
    });
    let [a, b] = threads.map(|t| t.join().unwrap());
    for i in [0, 1] {
        close(WHAT[i], &Tensor::cat(&[&a[i], &b[i]], 0), &whole[i], 1e-5);
    }
    for i in [2, 3] {
        close(WHAT[i], &(&a[i] + &b[i]), &whole[i], 1e-5);
    }
    for i in [4, 5] {
        close(WHAT[i], &a[i], &whole[i], 1e-6);
        assert_eq!(a[i], b[i]);
    }
}

#[test]
fn a_failing_sum_is_an_error_and_not_a_crash() {
    struct Broken;
    impl SumOverRanks for Broken {
        fn sum_in_place(&self, _: &Tensor) -> Result<(), String> {
            panic!("a peer is gone")
        }
    }
    let x = ops::channels_last(&Tensor::randn([2, 4, 8, 8], FLOAT)).unwrap();
    let (one, zero) = (Tensor::ones([4], FLOAT), Tensor::zeros([4], FLOAT));
    let args = NormAct {
        weight: &one,
        bias: &zero,
        running_mean: &zero.copy(),
        running_var: &one.copy(),
        momentum: 0.1,
        eps: 1e-5,
        slope: 0.01,
        dropout: 0.0,
        key: 0,
        sync: Some(Arc::new(Broken)),
    };
    assert!(ops::norm_act(&x, &args).is_err());
}

#[test]
fn a_label_that_is_no_class_is_refused() {
    let map = ops::channels_last(&Tensor::zeros([1, 4, 8, 8], FLOAT)).unwrap();
    let labels = Tensor::full([1, 8, 8], 4, (Kind::Uint8, Device::Cpu));
    assert!(ops::dice_sums(&map, &map, &labels).is_err());
    assert!(ops::dice_sums(&map, &map, &(labels - 1)).is_ok());
}

#[test]
fn sgd_is_libtorchs_bit_for_bit() {
    let vs = nn::VarStore::new(Device::Cpu);
    let theirs = vs.root().randn("w", &[64, 33], 0.0, 1.0);
    let ours = theirs.detach().copy().set_requires_grad(true);
    let buffer = ours.detach().zeros_like();
    let mut optimiser = nn::Sgd { momentum: 0.9, dampening: 0.0, wd: 1e-4, nesterov: false }
        .build(&vs, 0.01)
        .unwrap();
    for step in 0..5 {
        let pull = Tensor::randn([64, 33], FLOAT);
        optimiser.backward_step(&(&theirs * &pull).sum(Kind::Float));
        ops::grads_to_none(&[ours.shallow_clone()]).unwrap();
        (&ours * &pull).sum(Kind::Float).backward();
        let (p, b) = ([ours.shallow_clone()], [buffer.shallow_clone()]);
        ops::sgd(&p, &b, 0.01, 0.9, 1e-4, step == 0).unwrap();
        assert_eq!(ours.detach(), theirs.detach(), "step {step}");
    }
}
