//! The certificate authority that a token stands for, and the certificates that a process issues itself.
//!
//! HKDF-SHA256 makes the seed of an Ed25519 key of the token: the same in every process, so that what one signs the others
//! accept. A process's own key is random, its certificate valid for a day and renewed before; both live in memory only.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::hkdf;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SignatureAlgorithm,
};
use rustls::client::ResolvesClientCert;
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme};
use zeroize::Zeroizing;

use super::{JoinToken, TrustError};

/// What names the derivation: another version of it would be another authority.
const SALT: &[u8] = b"cpcr join token, version 1";
const KEY_OF_AUTHORITY: &[u8] = b"key of the certificate authority, Ed25519";
const PASSWORD_OF_PAGE: &[u8] = b"password of the page";
const KEY_OF_PAGE: &[u8] = b"key of the page's certificate authority, P-256";
/// What precedes an Ed25519 seed in PKCS#8 (RFC 8410).
const PKCS8_ED25519: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// What precedes a P-256 key in PKCS#8, without its public half (RFC 5915).
const PKCS8_P256: [u8; 35] = [
    0x30, 0x41, 2, 1, 0, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 3, 1, 7, 4, 0x27, 0x30, 0x25, 2, 1, 1, 4, 0x20,
];
/// The name in every certificate: who holds the token is told from who does not, hosts are not told apart.
const MEMBER: &str = "member.cpcr.internal";
/// Certificates that are kept.
const NAMES_MAX: usize = 64;
/// How long a certificate is valid, and how far clocks may differ.
const VALID: Duration = Duration::from_secs(24 * 60 * 60);
const SKEW: Duration = Duration::from_secs(60 * 60);

/// What a connection is for. One made for one purpose is refused where another is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// gRPC between agents, launchers and the coordinator.
    Control,
    /// Keys of c10d stores.
    Keys,
    /// The run's page, for browsers and scrapers: the server alone proves itself; its clients give a password.
    Page,
    /// S3 requests, which are signed: the server alone proves itself, by the name or address it was asked for.
    Objects,
}

impl Purpose {
    /// Its name in TLS's application layer protocol negotiation.
    fn protocol(self) -> &'static [u8] {
        match self {
            Self::Control => b"h2",
            Self::Keys => b"cpcr-keys",
            Self::Page | Self::Objects => b"http/1.1",
        }
    }
}

/// The name that a member's certificate must carry.
pub(super) fn member_name() -> Result<ServerName<'static>, TrustError> {
    ServerName::try_from(MEMBER).map_err(failed)
}

/// When a certificate was issued, by both clocks: one stands still while a machine sleeps, the other is set.
#[derive(Clone, Copy)]
struct Issued(Instant, SystemTime);

impl Issued {
    fn now() -> Self {
        Self(Instant::now(), SystemTime::now())
    }

    /// Whether others will take it for a good while yet.
    fn is_fresh(self) -> bool {
        let by_date = match SystemTime::now().duration_since(self.1) {
            Ok(age) => age < VALID / 2,
            Err(set_back) => set_back.duration() < SKEW / 2,
        };
        by_date && self.0.elapsed() < VALID / 2
    }
}

/// Who signs, the certificate by which that is checked, and what this process has had signed.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// Of the keys that are certified.
    kind: &'static SignatureAlgorithm,
    /// This process's certificates by the names in them, and when they were issued.
    own: Mutex<BTreeMap<String, (Issued, Arc<CertifiedKey>)>>,
}

impl Signer {
    fn new(
        key: KeyPair,
        kind: &'static SignatureAlgorithm,
        name: &str,
    ) -> Result<Self, TrustError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).map_err(failed)?.der().clone();
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, certificate, kind, own: Mutex::default() })
    }

    /// A key and a certificate for it, with a DNS name or an address in it, valid around `now`.
    fn issue(&self, name: &str, now: SystemTime) -> Result<CertifiedKey, TrustError> {
        let key = KeyPair::generate_for(self.kind).map_err(failed)?;
        let mut params = CertificateParams::new([name.to_owned()]).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = (now - SKEW).into();
        params.not_after = (now + VALID).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        let secret = PrivatePkcs8KeyDer::from(key.serialize_der());
        let key = provider::sign::any_supported_type(&secret.into()).map_err(failed)?;
        Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
    }

    /// This process's certificate with `name` in it: another one when half its time is over.
    fn own(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        // What it guards is replaced as a whole.
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((issued, key)) = own.get(name)
            && issued.is_fresh()
        {
            return Some(key.clone());
        }
        match self.issue(name, SystemTime::now()) {
            Ok(key) => {
                let key = Arc::new(key);
                if own.len() >= NAMES_MAX {
                    own.clear(); // somebody asks for names at random
                }
                own.insert(name.to_owned(), (Issued::now(), key.clone()));
                Some(key)
            }
            Err(error) => {
                tracing::error!(%error, "this process has nothing to show to others");
                None
            }
        }
    }
}

/// A run's authority, and this process's own certificate.
pub struct Authority {
    members: Signer,
    /// Another one for browsers, which do not take Ed25519.
    page: Signer,
    page_password: Zeroizing<String>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

fn failed(error: impl std::fmt::Display) -> TrustError {
    TrustError::Token(format!("no certificate can be made: {error}"))
}

/// Fills `bytes` with what the token stands for under a name.
fn derive(token: &JoinToken, name: &[u8], bytes: &mut [u8; 32]) -> Result<(), TrustError> {
    let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, SALT).extract(token.expose().as_bytes());
    secret.expand(&[name], hkdf::HKDF_SHA256).and_then(|output| output.fill(bytes)).map_err(failed)
}

/// What whoever may only look gives: the token cannot be told from it.
fn password_of(token: &JoinToken) -> Result<Zeroizing<String>, TrustError> {
    let mut bytes = Zeroizing::new([0; 32]);
    derive(token, PASSWORD_OF_PAGE, &mut bytes)?;
    Ok(Zeroizing::new(hex::encode(&bytes[..16])))
}

/// The key of the page's authority.
fn page_key_of(token: &JoinToken) -> Result<KeyPair, TrustError> {
    let mut secret = Zeroizing::new([0; 32]);
    derive(token, KEY_OF_PAGE, &mut secret)?;
    let mut key = Zeroizing::new([0; 67]);
    key[..PKCS8_P256.len()].copy_from_slice(&PKCS8_P256);
    key[PKCS8_P256.len()..].copy_from_slice(secret.as_slice());
    let key = PrivatePkcs8KeyDer::from(key.as_slice());
    KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256).map_err(failed)
}

/// The authority's key.
fn key_of(token: &JoinToken) -> Result<KeyPair, TrustError> {
    let mut seed = Zeroizing::new([0; 32]);
    derive(token, KEY_OF_AUTHORITY, &mut seed)?;
    let mut key = Zeroizing::new([0; 48]);
    key[..PKCS8_ED25519.len()].copy_from_slice(&PKCS8_ED25519);
    key[PKCS8_ED25519.len()..].copy_from_slice(seed.as_slice());
    KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key.as_slice()), &PKCS_ED25519)
        .map_err(failed)
}

impl Authority {
    /// The authority of `token`.
    ///
    /// # Errors
    /// [`TrustError::Token`] if the cryptography fails.
    pub fn derive(token: &JoinToken) -> Result<Self, TrustError> {
        let members = Signer::new(key_of(token)?, &PKCS_ED25519, "cpcr run")?;
        let page = Signer::new(page_key_of(token)?, &PKCS_ECDSA_P256_SHA256, "cpcr page")?;
        let mut roots = RootCertStore::empty();
        roots.add(members.certificate.clone()).map_err(failed)?;
        let provider = Arc::new(provider::default_provider());
        let roots = Arc::new(roots);
        let page_password = password_of(token)?;
        Ok(Self { members, page, page_password, roots, provider })
    }

    /// How this process serves holders of the token on its address `local`.
    pub(super) fn server(
        self: &Arc<Self>,
        purpose: Purpose,
        local: IpAddr,
    ) -> Result<Arc<ServerConfig>, TrustError> {
        let (roots, provider) = (self.roots.clone(), self.provider.clone());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?;
        let mut config = match purpose {
            Purpose::Control | Purpose::Keys => config
                .with_client_cert_verifier(verifier.build().map_err(failed)?)
                .with_cert_resolver(Arc::new(Own(self.clone()))),
            Purpose::Page | Purpose::Objects => config
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(Named(self.clone(), local, purpose))),
        };
        config.alpn_protocols = vec![purpose.protocol().to_vec()];
        // Every connection proves itself anew.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// The authority's certificate, for clients that check servers by themselves.
    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.members.certificate
    }

    /// The same for the page's.
    pub(super) fn page_certificate(&self) -> &CertificateDer<'static> {
        &self.page.certificate
    }

    /// What whoever may only look has to give.
    pub(super) fn page_password(&self) -> &str {
        &self.page_password
    }

    /// How it connects to them.
    pub(super) fn client(
        self: &Arc<Self>,
        purpose: Purpose,
    ) -> Result<Arc<ClientConfig>, TrustError> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_root_certificates(self.roots.clone())
            .with_client_cert_resolver(Arc::new(Own(self.clone())));
        config.alpn_protocols = vec![purpose.protocol().to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// Shows this process's certificate.
#[derive(Debug)]
struct Own(Arc<Authority>);

impl ResolvesServerCert for Own {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.members.own(MEMBER)
    }
}

impl ResolvesClientCert for Own {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.members.own(MEMBER)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Shows a certificate with the name that the client asks for; with the address that it came to, if it asks for none.
#[derive(Debug)]
struct Named(Arc<Authority>, IpAddr, Purpose);

impl ResolvesServerCert for Named {
    fn resolve(&self, client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let address = self.1.to_string();
        let name = client.server_name().unwrap_or(&address);
        let by = if self.2 == Purpose::Page { &self.0.page } else { &self.0.members };
        by.own(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> JoinToken {
        JoinToken::new(text, "test").unwrap()
    }

    /// A change of the derivation would cut off processes of another version. The figure is from Python's hmac (HKDF by
    /// RFC 5869) and `openssl pkey`.
    #[test]
    fn a_token_stands_for_one_key() {
        let key = |text| key_of(&token(text)).unwrap().public_key_raw().to_vec();
        let one = key("0123456789abcdef0123456789abcdef");
        assert_eq!(
            hex::encode(&one),
            "e19fb4386f5c2a28d55124bdf5b36f47d07e2ba33cb8d7e9f76f3400f5c8bde0"
        );
        assert_ne!(one, key("0123456789abcdef0123456789abcdeF"));
    }

    /// The figure is from Python's hmac and `openssl ec`.
    #[test]
    fn the_pages_authority_is_one_that_browsers_take() {
        let key = page_key_of(&token("0123456789abcdef0123456789abcdef")).unwrap();
        assert_eq!(
            hex::encode(key.public_key_raw()),
            "04bfa4c35da9353ba8c58a819ac7b54ded0d5ea2b6802a89d72829a326b6a83428929888b89586d03077d332fdeb6210515a77fd8e77b5f2aab7f0fce92afdaa56"
        );
        let authority = Authority::derive(&JoinToken::random().unwrap()).unwrap();
        let page = authority.page.own("localhost").unwrap();
        let member = authority.members.own("localhost").unwrap();
        assert_ne!(page.cert[0], member.cert[0], "each by its own authority");
        assert!(Arc::ptr_eq(&page, &authority.page.own("localhost").unwrap()));
    }

    #[test]
    fn a_certificate_is_kept_and_renewed_in_time() {
        let authority = Authority::derive(&JoinToken::random().unwrap()).unwrap();
        let members = &authority.members;
        let first = members.own(MEMBER).unwrap();
        assert!(Arc::ptr_eq(&first, &members.own(MEMBER).unwrap()));
        let now = Issued::now();
        let stale = [
            Issued(now.0.checked_sub(VALID / 2).unwrap(), now.1),
            Issued(now.0, now.1 - VALID / 2),
            Issued(now.0, now.1 + SKEW),
        ];
        for issued in stale {
            members.own.lock().unwrap().insert(MEMBER.to_owned(), (issued, first.clone()));
            assert!(!Arc::ptr_eq(&first, &members.own(MEMBER).unwrap()));
        }
        let own = members.own(MEMBER).unwrap();
        for name in 0..2 * NAMES_MAX {
            authority.page.own(&format!("host-{name}")).unwrap();
        }
        assert!(authority.page.own.lock().unwrap().len() <= NAMES_MAX);
        let after = members.own(MEMBER).unwrap();
        assert!(
            Arc::ptr_eq(&own, &after),
            "whoever asks the page for names does not touch members"
        );
    }
}
