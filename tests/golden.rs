//! DBPNet and CPCR against tensors made by the authors' reference implementation.
//!
//! The files lie in `tests/golden/`, or where `CPCR_GOLDEN_DIR` says; sizes and widths are read
//! from the tensors. Tolerance: max|a - b| <= tol * max|b|, 1e-5 for losses and forwards, 1e-4
//! for gradients (maximum over all gradients of the file) and weights after three steps. Networks and
//! losses are checked on the CPU, and on a GPU where libtorch can use one.
// Helpers of tests fail like tests.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use cpcr::bridge::{cuda, ops};
use cpcr::loss::{
    Alone, Counts, Objective, Path, StepLoss, TermWeights, cross_entropy, focal, rampup::RampUp,
};
use cpcr::method::{Consistency, McNet, Method, Passes, StepInput, Urpc};
use cpcr::model::{
    DecoderDraws, Draws, Dropout, Heads, HostTensor, Layout, Network, NetworkConfig, Noise,
    Outputs, Pyramid, Sgd, Statistics, UpMode, feature_dropout,
};
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

/// The CPU, and a GPU if there is one; `CPCR_EXPECT_GPU` makes its absence a failure.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cuda::device_count() > 0 {
        ops::allow_tf32(false).unwrap();
        devices.push(Device::Cuda(0));
    } else {
        assert!(std::env::var_os("CPCR_EXPECT_GPU").is_none(), "a GPU is expected, none is usable");
    }
    devices
}

/// Every device with every memory order.
fn places() -> Vec<(Device, Layout)> {
    devices().into_iter().flat_map(|device| LAYOUTS.map(|layout| (device, layout))).collect()
}

type Golden = BTreeMap<String, Tensor>;

const LAYOUTS: [Layout; 2] = [Layout::Planar, Layout::ChannelsLast];

fn golden(file: &str) -> Golden {
    golden_on(file, Device::Cpu)
}

fn golden_on(file: &str, device: Device) -> Golden {
    let folder = std::env::var_os("CPCR_GOLDEN_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    let path = folder.join(format!("{file}.safetensors"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let one = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::I64 => Kind::Int64,
            Dtype::U8 => Kind::Uint8,
            other => panic!("{name} is {other:?}"),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        (name, Tensor::from_data_size(view.data(), &shape, kind).to_device(device))
    };
    tensors.tensors().into_iter().map(one).collect()
}

fn top(t: &Tensor) -> f64 {
    t.to_kind(Kind::Double).abs().max().double_value(&[])
}

/// Fails where `ours` is further than `tol * scale` from `theirs`, or is not a number.
fn near(what: &str, ours: &Tensor, theirs: &Tensor, tol: f64, scale: f64) {
    assert_eq!(ours.size(), theirs.size(), "{what}: shape");
    let [ours, theirs] = [ours, theirs].map(|t| t.to_device(Device::Cpu).to_kind(Kind::Double));
    let off = top(&(ours - theirs));
    assert!(off <= tol * scale, "{what}: off by {off:e}, allowed {:e}", tol * scale);
}

fn close(what: &str, ours: &Tensor, theirs: &Tensor, tol: f64) {
    near(what, ours, theirs, tol, top(theirs));
}

fn close_value(what: &str, ours: f64, theirs: &Tensor, tol: f64) {
    let theirs = theirs.double_value(&[]);
    let off = (ours - theirs).abs();
    assert!(off <= tol * theirs.abs(), "{what}: {ours}, reference {theirs}");
}

/// The state under a prefix, as the model imports it.
fn state(golden: &Golden, prefix: &str) -> Vec<HostTensor> {
    let under = golden.iter().filter_map(|(n, t)| n.strip_prefix(prefix).map(|n| (n, t)));
    under
        .map(|(name, t)| {
            let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
            t.to_device(Device::Cpu).copy_data_u8(&mut bytes, t.numel());
            HostTensor {
                name: name.to_owned(),
                dtype: if t.kind() == Kind::Int64 { "I64" } else { "F32" }.to_owned(),
                shape: t.size().iter().map(|&d| d as usize).collect(),
                bytes,
            }
        })
        .collect()
}

/// A network with the sizes and weights under a prefix.
fn network(golden: &Golden, prefix: &str, up: &[UpMode], layout: Layout) -> Network {
    let size = |name: &str| golden[&format!("{prefix}{name}")].size();
    let first = size("encoder.in_conv.conv_conv.0.weight");
    let mut widths = [first[0]; 5];
    for (i, width) in widths.iter_mut().enumerate().skip(1) {
        *width = size(&format!("encoder.down{i}.maxpool_conv.1.conv_conv.0.weight"))[0];
    }
    let decoder = if up.len() == 1 { "decoder" } else { "decoder1" };
    let classes = size(&format!("{decoder}.out_conv.weight"))[0];
    let pyramid = golden.contains_key(&format!("{prefix}{decoder}.out_conv_dp1.weight"));
    let in_channels = first[1];
    let config = NetworkConfig {
        in_channels,
        classes,
        widths,
        up: up.to_vec(),
        pyramid,
        layout,
        ..NetworkConfig::default()
    };
    let net =
        Network::new(config, golden[&format!("{prefix}{decoder}.out_conv.weight")].device(), 0)
            .unwrap();
    net.params().load_host(&state(golden, prefix)).unwrap();
    net
}

fn check_forward(file: &str, up: &[UpMode], predictions: usize) {
    for (device, layout) in places() {
        let g = golden_on(file, device);
        let net = network(&g, "w.", up, layout);
        let all = net.forward_eval_all(&g["x"]).unwrap();
        assert_eq!(all.len(), predictions);
        for (i, ours) in all.iter().enumerate() {
            close(
                &format!("{file} out.{i} {device:?} {layout:?}"),
                ours,
                &g[&format!("out.{i}")],
                1e-5,
            );
        }
        let main = net.forward_eval(&g["x"]).unwrap();
        close("decoder 1 alone", &main, &g["out.0"], 1e-5);
        let mean = net.forward_eval_mean(&g["x"]).unwrap();
        let each = predictions / up.len();
        let mains: Vec<Tensor> = (0..up.len())
            .map(|d| g[&format!("out.{}", d * each)].softmax(1, Kind::Float))
            .collect();
        let theirs = Tensor::stack(&mains, 0).mean_dim([0i64].as_slice(), false, Kind::Float);
        close("mean of the decoders", &mean, &theirs, 1e-5);
    }
}

#[test]
fn forward_bilinear_and_transposed() {
    check_forward("forward_dbpnet", &[UpMode::Bilinear, UpMode::Transposed], 8);
}

#[test]
fn forward_nearest_and_bicubic() {
    check_forward("forward_dbpnet_nearest_bicubic", &[UpMode::Nearest, UpMode::Bicubic], 8);
}

#[test]
fn forward_of_urpc_and_mcnet() {
    check_forward("forward_urpc", &[UpMode::Bilinear], 4);
    check_forward("forward_mcnet", &[UpMode::Bilinear, UpMode::Transposed], 2);
}

#[test]
fn a_state_survives_export_under_the_references_names() {
    let g = golden("forward_dbpnet");
    for layout in LAYOUTS {
        let net = network(&g, "w.", &[UpMode::Bilinear, UpMode::Transposed], layout);
        let mut ours = net.params().to_host().unwrap();
        ours.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(ours, state(&g, "w."));
    }
}

fn outputs(g: &Golden, layout: Layout) -> Outputs {
    let get = |name: String| match layout {
        Layout::Planar => g[&name].shallow_clone(),
        Layout::ChannelsLast => ops::channels_last(&g[&name]).unwrap(),
    };
    let pyramid = |d: &str| Pyramid {
        main: get(format!("{d}.0")),
        aux: Some([1, 2, 3].map(|s| get(format!("{d}.{s}.low")))),
    };
    let decoders = vec![pyramid("d1"), pyramid("d2")];
    Outputs { decoders, statistics: Statistics::default() }
}

fn term(loss: &StepLoss, name: &str) -> f64 {
    loss.values().unwrap().iter().find(|(n, _)| *n == name).unwrap().1
}

const WEIGHTS: TermWeights =
    TermWeights { dice: 1.0, focal: 0.0, kd_main: 0.1, entropy: 0.1, kd_aux: 0.05 };

fn alone(samples: i64, labelled: i64) -> Counts {
    Counts { world: 1, labelled: labelled as u64, samples: samples as u64 }
}

#[test]
fn losses_and_their_gradients() {
    devices().into_iter().for_each(check_losses);
}

fn check_losses(device: Device) {
    let g = golden_on("loss_cpcr", device);
    let samples = g["label"].size()[0];
    let labelled = samples / 2;
    let labels = g["label"].narrow(0, 0, labelled);
    let counts = alone(samples, labelled);
    let all = |f: &dyn Fn(&str)| {
        for d in ["d1", "d2"] {
            for s in ["0", "1.low", "2.low", "3.low"] {
                f(&format!("grad.{d}.{s}"));
            }
        }
    };
    let scale = std::cell::Cell::new(0.0f64);
    all(&|name| scale.set(scale.get().max(top(&g[name]))));
    for (path, layout) in
        [Path::Auto, Path::Plain].into_iter().flat_map(|p| LAYOUTS.map(|l| (p, l)))
    {
        let objective = Objective { path, ..Objective::default() };
        let loss =
            objective.step(&outputs(&g, layout), &labels, &WEIGHTS, &counts, &Alone).unwrap();
        for name in ["dice", "kd_main", "kd_aux", "entropy", "total"] {
            close_value(&format!("{name} {path:?} {layout:?}"), term(&loss, name), &g[name], 1e-5);
        }
        assert_eq!(term(&loss, "focal"), 0.0);
        // Roots: main of d1 and d2, then each scale's pair.
        let order = [
            "d1.0", "d2.0", "d1.1.low", "d2.1.low", "d1.2.low", "d2.2.low", "d1.3.low", "d2.3.low",
        ];
        assert_eq!(loss.grads.len(), order.len());
        for (name, ours) in order.iter().zip(&loss.grads) {
            let what = format!("grad {name} {path:?} {layout:?}");
            near(&what, ours, &g[&format!("grad.{name}")], 1e-4, scale.get());
            // Each by its own size too: coarse maps' gradients are small beside the largest.
            close(&what, ours, &g[&format!("grad.{name}")], 1e-4);
        }
    }
}

#[test]
fn focal_loss_and_cross_entropy() {
    let g = golden("loss_cpcr");
    let samples = g["label"].size()[0];
    let labelled = samples / 2;
    let labels = g["label"].narrow(0, 0, labelled);
    let indices = labels.to_kind(Kind::Int64);
    let pixels = indices.numel() as f64;
    let one = |d: &str, gamma: f64| {
        let logits = g[d].narrow(0, 0, labelled);
        focal::sum(&logits, &indices, gamma).unwrap().double_value(&[]) / pixels
    };
    close_value("focal", one("d1.0", 2.5), &g["focal_2.5_d1"], 1e-5);
    close_value("cross-entropy", one("d1.0", 0.0) + one("d2.0", 0.0), &g["ce"], 1e-5);
    // The fused kernel against the formula: value and gradient, both decoders.
    let weights = TermWeights { dice: 0.0, focal: 1.0, kd_main: 0.0, entropy: 0.0, kd_aux: 0.0 };
    let counts = alone(samples, labelled);
    let run = |path: Path, gamma: f64| {
        let objective = Objective { path, gamma, ..Objective::default() };
        objective
            .step(&outputs(&g, Layout::ChannelsLast), &labels, &weights, &counts, &Alone)
            .unwrap()
    };
    for gamma in [0.0, 2.5] {
        let (fused, plain) = (run(Path::Auto, gamma), run(Path::Plain, gamma));
        let both = Tensor::from(one("d1.0", gamma) + one("d2.0", gamma));
        close_value("fused focal", term(&fused, "focal"), &both, 1e-5);
        close_value("plain focal", term(&plain, "focal"), &both, 1e-5);
        for (a, b) in fused.grads.iter().zip(&plain.grads) {
            close("focal gradient", a, b, 1e-5);
        }
    }
}

/// The outputs of decoders whose full-size logits are given, pyramids of `each` predictions.
fn leaves(g: &Golden, each: usize) -> (Vec<Tensor>, Outputs) {
    let all: Vec<Tensor> = (0..)
        .map_while(|i| g.get(&format!("logits.{i}")))
        .map(|t| t.detach().copy().set_requires_grad(true))
        .collect();
    let pyramid = |heads: &[Tensor]| Pyramid {
        main: heads[0].shallow_clone(),
        // Full-size maps: bringing them to full size changes nothing.
        aux: (each == 4).then(|| [1, 2, 3].map(|i: usize| heads[i].shallow_clone())),
    };
    let decoders = all.chunks(each).map(pyramid).collect();
    (all, Outputs { decoders, statistics: Statistics::default() })
}

/// Terms, total and gradients of a method whose weight on consistency is the file's 0.05.
fn check_method(file: &str, method: &dyn Method, each: usize, terms: &[&str]) {
    for device in devices() {
        let g = golden_on(file, device);
        let samples = g["label"].size()[0];
        let labels = g["label"].narrow(0, 0, samples / 2);
        let (leaves, outputs) = leaves(&g, each);
        let step = StepInput {
            images: &leaves[0],
            labels: &labels,
            samples: &[],
            counts: alone(samples, samples / 2),
            done: 0,
            seed: 1,
            rank: 0,
            sync: None,
            ranks: &Alone,
            global_dice: true,
        };
        let passes = Passes { outputs: vec![outputs], targets: Vec::new() };
        let loss = method.loss(&passes, &step).unwrap();
        for name in terms {
            close_value(&format!("{file} {name}"), term(&loss, name), &g[*name], 1e-5);
        }
        if let Some(supervised) = g.get("supervised") {
            let ours = 0.5 * (term(&loss, "dice") + term(&loss, "ce"));
            close_value(&format!("{file} supervised"), ours, supervised, 1e-5);
        }
        ops::backward(&loss.roots, &loss.grads).unwrap();
        let grads: Vec<&Tensor> = (0..leaves.len()).map(|i| &g[&format!("grad.{i}")]).collect();
        let scale = grads.iter().map(|t| top(t)).fold(0.0, f64::max);
        for (i, (ours, theirs)) in leaves.iter().zip(&grads).enumerate() {
            near(&format!("{file} grad.{i}"), &ours.grad(), theirs, 1e-4, scale);
        }
    }
}

fn always(weight: f64) -> Consistency {
    Consistency { warm_up: 0, ramp: RampUp { top: weight, length: 0, every: 1 } }
}

#[test]
fn the_losses_of_urpc_and_mcnet() {
    // URPC halves lambda.
    check_method("loss_urpc", &Urpc { consistency: always(0.1) }, 4, &["consistency", "total"]);
    let mcnet = McNet { consistency: always(0.05) };
    check_method("loss_mcnet", &mcnet, 1, &["dice", "consistency", "total"]);
    // The main head's cross-entropy alone.
    let g = golden("loss_urpc");
    let n = g["label"].size()[0] / 2;
    let labels = g["label"].narrow(0, 0, n).to_kind(Kind::Int64);
    let sum = cross_entropy::sum(&g["logits.0"].narrow(0, 0, n), &labels).unwrap();
    close_value("ce", sum.double_value(&[]) / labels.numel() as f64, &g["ce"], 1e-5);
}

#[test]
fn feature_dropout_keeps_the_less_active_places() {
    let g = golden("perturb");
    close(
        "feature dropout",
        &feature_dropout(&g["x"], 0.8).unwrap(),
        &g["feature_dropout_0.8"],
        1e-5,
    );
}

#[test]
fn the_ramp_up() {
    let g = golden("rampup");
    for i in 0..g["iteration"].size()[0] {
        let t = g["iteration"].int64_value(&[i]) as u64;
        let theirs = g["weight"].double_value(&[i]);
        let ours = RampUp::default().at(t);
        assert!((ours - theirs).abs() <= 1e-9 * theirs.abs(), "lambda({t}) = {ours}, not {theirs}");
    }
}

#[test]
fn three_training_steps() {
    for (device, layout) in places() {
        let g = golden_on("train3_cpcr", device);
        let weights = TermWeights { kd_aux: g["consistency_weight"].double_value(&[]), ..WEIGHTS };
        let net = network(&g, "w0.", &[UpMode::Bilinear, UpMode::Transposed], layout);
        let names = net.trained(Heads::All);
        let mut sgd = Sgd::new(0.01, 0.9, 1e-4);
        for step in 0..g["x"].size()[0] {
            let x = g["x"].get(step);
            let samples = x.size()[0];
            let labels = g["label"].get(step).narrow(0, 0, samples / 2);
            let decoder = |name: &str| DecoderDraws {
                noise: Noise::Given(g[name].shallow_clone()),
                threshold: 0.8,
            };
            let draws = Draws {
                decoders: [decoder("noise.d1"), decoder("noise.d2")],
                dropout: Dropout::Off,
            };
            let out = net.forward_train(&x, &draws, Heads::All, None).unwrap();
            let counts = alone(samples, samples / 2);
            let loss = Objective::default().step(&out, &labels, &weights, &counts, &Alone).unwrap();
            for name in ["dice", "kd_main", "kd_aux", "entropy", "total"] {
                let what = format!("step {step} {name} {device:?} {layout:?}");
                close_value(&what, term(&loss, name), &g[&format!("step{step}.{name}")], 1e-5);
            }
            let all: Vec<Tensor> =
                net.params().parameters().map(|(_, t)| t.shallow_clone()).collect();
            ops::grads_to_none(&all).unwrap();
            ops::backward(&loss.roots, &loss.grads).unwrap();
            if step == 0 {
                check_gradients(&g, &net, &names);
            }
            sgd.step(net.params()).unwrap();
            out.statistics.commit().unwrap();
        }
        for host in net.params().to_host().unwrap() {
            let ours = net.params().get(&host.name).unwrap().detach();
            let theirs = &g[&format!("w3.{}", host.name)];
            if host.dtype == "I64" {
                assert_eq!(ours.int64_value(&[]), theirs.int64_value(&[]), "{}", host.name);
            } else {
                close(&format!("w3.{} {layout:?}", host.name), &ours, theirs, 1e-4);
            }
        }
        assert_eq!(sgd.to_host().unwrap().len(), names.len());
    }
}

/// Every gradient of the file has its parameter, and the other way round.
fn check_gradients(g: &Golden, net: &Network, names: &[String]) {
    let theirs: Vec<&str> = g.keys().filter_map(|n| n.strip_prefix("grad0.")).collect();
    let mut ours: Vec<&str> = names.iter().map(String::as_str).collect();
    ours.sort_unstable();
    assert_eq!(ours, theirs);
    let scale = theirs.iter().map(|n| top(&g[&format!("grad0.{n}")])).fold(0.0, f64::max);
    for name in theirs {
        let grad = net.params().get(name).unwrap().grad();
        near(&format!("grad0.{name}"), &grad, &g[&format!("grad0.{name}")], 1e-4, scale);
    }
    for head in ["decoder1", "decoder2"] {
        let unused = net.params().get(&format!("{head}.out_conv_dp4.weight")).unwrap();
        assert!(!unused.grad().defined());
    }
}

/// The golden files' networks are narrow; at the paper's widths the convolutions of our own come in,
/// which planar tensors never meet.
#[test]
fn at_the_papers_widths_both_memory_orders_agree() {
    tch::manual_seed(7);
    let x = Tensor::rand([2, 1, 64, 64], (Kind::Float, Device::Cpu));
    let labels = Tensor::randint(4, [1, 64, 64], (Kind::Uint8, Device::Cpu));
    let run = |layout: Layout| {
        let config = NetworkConfig { layout, ..NetworkConfig::default() };
        let net = Network::new(config, Device::Cpu, 3).unwrap();
        let eval = net.forward_eval_all(&x).unwrap();
        let draws = Draws { dropout: Dropout::Off, ..Draws::keyed(1, 2, 0) };
        let out = net.forward_train(&x, &draws, Heads::All, None).unwrap();
        let loss =
            Objective::default().step(&out, &labels, &WEIGHTS, &alone(2, 1), &Alone).unwrap();
        ops::backward(&loss.roots, &loss.grads).unwrap();
        (net, eval, term(&loss, "total"))
    };
    let ((planar, eval, total), (ours, our_eval, our_total)) =
        (run(Layout::Planar), run(Layout::ChannelsLast));
    for (i, (a, b)) in our_eval.iter().zip(&eval).enumerate() {
        close(&format!("out.{i}"), a, b, 1e-5);
    }
    assert!((our_total - total).abs() <= 1e-5 * total, "{our_total} and {total}");
    let trained = planar.trained(Heads::All);
    let grad = |net: &Network, name: &str| net.params().get(name).unwrap().grad();
    let scale = trained.iter().map(|name| top(&grad(&planar, name))).fold(0.0, f64::max);
    for name in &trained {
        near(name, &grad(&ours, name), &grad(&planar, name), 1e-4, scale);
    }
}

#[test]
fn a_check_can_fail() {
    let g = golden("perturb");
    let wrong = feature_dropout(&g["x"], 0.5).unwrap();
    let check = || close("wrong", &wrong, &g["feature_dropout_0.8"], 1e-5);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err());
    let nan = &g["x"] * f64::NAN;
    let check = || close("nan", &nan, &g["x"], 1e-5);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err());
    let check = || close_value("off", 1.0002, &Tensor::from(1.0), 1e-4);
    assert!(std::panic::catch_unwind(check).is_err());
}
