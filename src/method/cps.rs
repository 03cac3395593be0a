//! CPS, cross pseudo supervision (Chen et al., CVPR 2021; weights and schedule as the SSL4MIS benchmark runs it).
//!
//! Two U-Nets drawn from different seeds. Each: (Dice + CE) / 2 on the labelled samples, plus lambda(t) times the
//! cross-entropy against the other's arg-max on the unlabelled ones. The first is the one that is evaluated.
//! The benchmark draws its two networks' weights by Kaiming's and by Xavier's rule; here both are PyTorch's
//! default. Its learning rate falls one step earlier than `train.schedule = "poly"`, which is URPC's and mean teacher's.

use tch::Tensor;

use super::{
    Consistency, Method, MethodError, Passes, StepInput, main_logits, sum_of, supervised, u_net,
};
use crate::loss::{StepLoss, cross_entropy};
use crate::model::{Cast, Ensemble, Heads, NetworkConfig};

/// The method.
#[derive(Debug, Clone, Copy)]
pub struct Cps {
    /// lambda(t).
    pub consistency: Consistency,
}

impl Method for Cps {
    fn cast(&self) -> Cast {
        Cast { two_students: true, teacher: false }
    }

    fn network(&self, sizes: NetworkConfig) -> NetworkConfig {
        u_net(sizes)
    }

    fn terms(&self) -> &'static [&'static str] {
        &["dice", "ce", "pseudo", "total"]
    }

    fn consistency_weight(&self, done: u64) -> f64 {
        self.consistency.at(done)
    }

    fn forward(&self, nets: &Ensemble, step: &StepInput) -> Result<Passes, MethodError> {
        let mut outputs = Vec::with_capacity(2);
        for (i, net) in nets.students().enumerate() {
            let draws = step.draws("student", i as u64);
            outputs.push(net.forward_train(step.images, &draws, Heads::Main, step.sync)?);
        }
        Ok(Passes { outputs, targets: Vec::new() })
    }

    fn loss(&self, passes: &Passes, step: &StepInput) -> Result<StepLoss, MethodError> {
        let [one, two] = passes.outputs.as_slice() else {
            return Err(MethodError::Networks("a second student"));
        };
        let logits = [main_logits(one, 0)?, main_logits(two, 0)?];
        let [d1, c1] = supervised(logits[0], step)?;
        let [d2, c2] = supervised(logits[1], step)?;
        let weight = self.consistency_weight(step.done);
        let pseudo = if weight == 0.0 {
            d1.f_zeros_like()?
        } else {
            let n = step.labelled();
            let rest = |t: &Tensor| t.f_narrow(0, n, t.size()[0] - n);
            let (a, b) = (rest(logits[0])?, rest(logits[1])?);
            // [N, C, H, W] -> [N, H, W]
            let (of_a, of_b) =
                (a.f_detach()?.f_argmax(1, false)?, b.f_detach()?.f_argmax(1, false)?);
            let sum = cross_entropy::sum(&a, &of_b)?.f_add(&cross_entropy::sum(&b, &of_a)?)?;
            step.spread().mean(&sum, step.counts.unlabelled() as f64 * step.pixels())?
        };
        let shares = [(0.5, sum_of(&[d1, d2])?), (0.5, sum_of(&[c1, c2])?), (weight, pseudo)];
        Ok(StepLoss::of(self.terms(), &shares, &step.counts)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, outputs};
    use super::*;

    /// One unlabelled pixel pair by hand: each network learns the other's class.
    #[test]
    fn each_network_is_taught_the_others_arg_max() {
        let logits = |l: [f32; 2], u: [f32; 2]| {
            Tensor::from_slice(&[l[0], l[1], u[0], u[1]]).view([2, 2, 1, 1]).set_requires_grad(true)
        };
        let (a, b) = (logits([0.0, 0.0], [2.0, 0.0]), logits([0.0, 0.0], [0.0, 1.0]));
        let case = Case::new(1, 1, [1, 1]);
        let method = Cps { consistency: super::super::testing::always(0.3) };
        let passes = Passes { outputs: vec![outputs(&a), outputs(&b)], targets: Vec::new() };
        let loss = method.loss(&passes, &case.step(0)).unwrap();
        let values: std::collections::BTreeMap<_, _> = loss.values().unwrap().into_iter().collect();
        // -log p of the other's class: network 1 says class 0, network 2 class 1.
        let (p, q) = (1.0 / (1.0 + (-2.0f64).exp()), 1.0 / (1.0 + (-1.0f64).exp()));
        let pseudo = -(1.0 - p).ln() - (1.0 - q).ln();
        assert!((values["pseudo"] - pseudo).abs() < 1e-6, "{values:?}");
        assert!((values["ce"] - 2.0 * 2f64.ln()).abs() < 1e-6, "{values:?}");
        let total = 0.5 * (values["dice"] + values["ce"]) + 0.3 * pseudo;
        assert!((values["total"] - total).abs() < 1e-6, "{values:?}");
        crate::bridge::ops::backward(&loss.roots, &loss.grads).unwrap();
        // d(-log p1)/d logit 1 = p1 - 1 = -p, weighed by 0.3.
        let pull = a.grad().double_value(&[1, 1, 0, 0]);
        assert!((pull + 0.3 * p).abs() < 1e-6, "{pull}");
    }
}
